FROM python:3.12-slim AS build

# the compiler of the native CPU kernels follows the base image's release
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# where PyTorch comes from; empty: pip's own index, which has the CUDA build
ARG TORCH_INDEX=""
ENV PATH=/opt/lorasrv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src

# a layer of its own: PyTorch is large and changes only with its pin
COPY constraints.txt ./
RUN python -m venv /opt/lorasrv \
    && pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && pip install --constraint constraints.txt hatchling

COPY . .
RUN pip install --constraint constraints.txt --no-build-isolation .


FROM python:3.12-slim

RUN useradd --uid 10001 --user-group --create-home lorasrv
COPY --from=build /opt/lorasrv /opt/lorasrv
ENV PATH=/opt/lorasrv/bin:$PATH PYTHONUNBUFFERED=1

USER 10001:10001
WORKDIR /home/lorasrv
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["lorasrv", "health", "--ready"]

ENTRYPOINT ["lorasrv"]
# a container is reached from outside it: publish the port only where every caller may use the server
CMD ["serve", "--host", "0.0.0.0", "--insecure"]
