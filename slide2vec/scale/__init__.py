"""One cohort over several devices and machines."""
