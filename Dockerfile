# docker build -t mcp-auth-proxy:0.1.0 .
# docker run --read-only -v proxy-data:/data -v ./config.yaml:/etc/mcp-auth-proxy/config.yaml:ro mcp-auth-proxy:0.1.0
#
# The configuration has to keep its store on the volume: `store: {url: sqlite:////data/mcp-auth-proxy.db}`.
# Nothing else is written, so the root file system can be read-only.

FROM python:3.11-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY requirements/build.txt requirements/run.txt requirements/
RUN python -m venv /tools \
    && /tools/bin/pip install --quiet --require-hashes -r requirements/build.txt \
    && python -m venv /app \
    && /app/bin/pip install --quiet --require-hashes -r requirements/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /tools/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /dist . \
    && /app/bin/pip install --quiet --no-deps --no-index /dist/*.whl \
    && /app/bin/pip uninstall --quiet --yes setuptools pip

FROM python:3.11-slim
LABEL org.opencontainers.image.title="mcp-auth-proxy" \
      org.opencontainers.image.description="A reverse proxy that does OAuth on behalf of MCP clients." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 proxy \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin proxy \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data
COPY --from=build /app /app
ENV PATH=/app/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /data
VOLUME /data
USER 10001:10001
EXPOSE 8787
STOPSIGNAL SIGTERM
# No proxy of the environment may stand between the probe and the loopback, hence the empty handler.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:8787/healthz', timeout=3)"]
ENTRYPOINT ["mcp-auth-proxy"]
CMD ["serve", "--config", "/etc/mcp-auth-proxy/config.yaml"]
