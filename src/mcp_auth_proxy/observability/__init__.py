"""What the proxy says about itself: logs without secrets, metrics, trace ids. Every layer may import it.

``logs`` (formats, levels) over ``redaction`` · ``outages`` (rate-limited warnings) · ``access_log`` ·
``trace`` (W3C trace context) · ``metrics`` (what is counted) over ``instruments`` (counters, histograms, text format).
"""
