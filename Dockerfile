# docker build -t mcp-auth-proxy:0.1.0 --build-arg REVISION="$(git rev-parse HEAD)" --build-arg CREATED="$(date -u +%FT%TZ)" .
#
# How to run it: compose.yaml, and docs/deployment.md. The root file system can be read-only, and the user can be any
# uid with group 0: only /data is written.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY requirements/build.txt requirements/run.txt requirements/
RUN python -m venv --without-pip /tools \
    && python -m pip --python /tools/bin/python install --quiet --no-compile --require-hashes -r requirements/build.txt \
    && python -m venv --without-pip /app \
    && python -m pip --python /app/bin/python install --quiet --no-compile --require-hashes -r requirements/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
# Compiled here, once: nothing can be written when the image runs. The source is not looked at again, because the times
# of files may change on their way into a layer.
RUN /tools/bin/python -m hatchling build -t wheel -d /dist \
    && python -m pip --python /app/bin/python install --quiet --no-compile --no-deps --no-index /dist/*.whl \
    && /app/bin/python -m compileall -q --invalidation-mode unchecked-hash /app/lib

FROM python:3.13-slim
ARG SOURCE=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="mcp-auth-proxy" \
      org.opencontainers.image.description="A reverse proxy that does OAuth on behalf of MCP clients." \
      org.opencontainers.image.source="$SOURCE" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.created="$CREATED" \
      org.opencontainers.image.licenses="Apache-2.0"
# The base has pip, which is not needed, and an uncompiled standard library. With group 0, any uid can write to /data.
RUN stdlib="$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && python -m pip uninstall --quiet --yes --break-system-packages --root-user-action ignore pip \
    && rm -rf "$stdlib/ensurepip" \
    && python -m compileall -q -x '/(test|tests|idlelib|lib2to3)/' "$stdlib" \
    && install --directory --owner=10001 --group=0 --mode=0770 /data
COPY --from=build /app /app
ENV PATH=/app/bin:$PATH \
    HOME=/data \
    MCP_AUTH_PROXY_CONFIG=/etc/mcp-auth-proxy/config.yaml \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /data
VOLUME /data
USER 10001:0
EXPOSE 8787
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 CMD ["mcp-auth-proxy", "healthcheck"]
ENTRYPOINT ["mcp-auth-proxy"]
CMD ["serve"]
