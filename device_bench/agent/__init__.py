"""What is copied to a device: ``agent.py``, one file that needs no other file of this project."""
