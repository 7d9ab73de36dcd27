"""Types, checks of numbers, and sums over ranks. All other rooms import from this one."""
