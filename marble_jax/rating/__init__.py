"""People as judges: a blind page that asks them about images of several models, their votes, and what these come to."""
