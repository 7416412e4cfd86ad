"""Random faults against a run for as long as one likes, and a judge of its history at the end."""
