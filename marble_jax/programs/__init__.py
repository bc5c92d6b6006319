"""What each verb of the command line does, from end to end."""
