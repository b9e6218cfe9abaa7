"""The benchmark: ``make bench`` prints the tables of one run.

    __main__      the command line
    run           which measures are taken of which contenders, in which order
    workloads     the request, and the forms in which servers answer it
    backend       what stands behind the contenders
    origin        authorization server, MCP answers, event streams, held streams
    nginx         nginx as the constant upstream, plain and behind TLS, and as the proxy to compare with
    certificates  the certificates of the upstream behind TLS
    contenders    direct, nginx, FastMCP's proxy, ours, and ours from another checkout
    processes     child processes: start, CPU time, memory, stop
    load          one load generator for all contenders
    measures      rates, streams, download, start-up
    results       the numbers of one run, and the targets
    report        the tables

All traffic stays on 127.0.0.1, and the run stops every process that it started.
"""
