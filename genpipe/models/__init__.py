"""The networks: nn.Modules with a Config each, no I/O. Sizes that data decides are keyword arguments."""
