"""What the cloud of a split model can read: attacks on the rows it sees, each with its measured recovery."""
