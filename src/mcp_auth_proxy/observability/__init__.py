"""What the proxy tells of itself: logs without secrets."""
