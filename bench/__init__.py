"""The benchmark: ``make bench`` prints one table from one run.

    __main__     the command line: what is measured, in which order
    processes    child processes: start, CPU time, memory, stop
    origin       what stands behind the proxies: authorization server, MCP answers, held streams
    nginx        nginx as the constant upstream and as the proxy to compare with
    contenders   direct, nginx, FastMCP's proxy, ours: each started the same way
    load         one load generator for all contenders
    measures     throughput, streams, download, start-up
    report       the table, the ratios, the targets

All traffic stays on 127.0.0.1, and every process that is started here is ended here.
"""
