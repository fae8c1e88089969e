"""Settings of the whole suite."""

from hypothesis import settings

# The machines that run this are shared: no example has a deadline, and every run has the same ones.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
