"""What a run records: in MLflow, of which this is the only room that imports it, or in files of the store."""
