"""The only room that imports MLflow."""
