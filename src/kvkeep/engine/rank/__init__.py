"""One rank's half: it does the copies of a step's plan and reports them."""
