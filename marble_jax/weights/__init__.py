"""Files of published weights: reading them, mapping their keys to parameters, hashing what they hold."""
