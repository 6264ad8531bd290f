"""What the command line does, where it takes more than one call of one room."""
