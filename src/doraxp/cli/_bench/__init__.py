"""The parts of `doraxp bench`: what is measured, by whom, how, and how it is shown."""
