"""What a browser sees: the link, the callback, the front page; and the guard before every route."""
