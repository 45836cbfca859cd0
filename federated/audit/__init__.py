"""What a trained model or an upload tells of the examples it was made of: attacks as measures.

They are for tests and reports, with and without protection; a low figure is no proof of privacy,
which only a bound such as epsilon is.
"""
