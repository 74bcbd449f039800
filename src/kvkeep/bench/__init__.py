"""The cases of `kvkeep bench`, each timed beside a yardstick in the same run, and the table that shows them."""
