"""What a run would do: the graph of stages, its plan, costs, and the spec of one job."""
