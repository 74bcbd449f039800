"""What `kvkeep bench` measures: the cases, each beside a yardstick of the same run, and how rows are shown."""
