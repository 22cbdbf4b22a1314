"""Running a stage: in this process (`local`) or on Ray (`ray`)."""
