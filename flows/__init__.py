"""When stages run: the pipeline graph and its Prefect flows."""
