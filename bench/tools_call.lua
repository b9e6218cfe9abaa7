-- One MCP request for every contender: a stateless tools/call of revision 2026-07-28.
-- The environment has the body and the header fields; the outcome goes to stdout as one line of JSON.

wrk.method = "POST"
wrk.body = os.getenv("BENCH_BODY")
for line in os.getenv("BENCH_HEADERS"):gmatch("[^\n]+") do
    local name, value = line:match("^([^:]+): (.*)$")
    wrk.headers[name] = value
end

done = function(summary, latency)
    local errors = summary.errors
    io.write(string.format(
        'BENCH {"requests": %d, "seconds": %.6f, "p50": %.9f, "p99": %.9f, "errors": %d}\n',
        summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6,
        errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
