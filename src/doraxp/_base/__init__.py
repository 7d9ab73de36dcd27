"""The ground that all other rooms stand on: types, numbers, sums over ranks."""
