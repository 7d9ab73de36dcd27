"""Published implementations of DoRA, with the functions that `check_implementation` calls."""
