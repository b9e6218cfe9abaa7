"""Logs without secrets, metrics and trace ids. Every layer may import these.

``logs`` (formats, levels) over ``redaction`` · ``outages`` (rate-limited warnings) · ``access_log`` ·
``trace`` (W3C trace context) · ``metrics`` (what is counted) over ``instruments`` (counters, histograms, text format)
and ``process`` (CPU, memory, files).
"""
