"""The pages for browsers (link, callback, front page), and the guard in front of all routes."""
