# A worker. Build from the repository's root:
#   docker build -f deploy/worker.Dockerfile -t graft-worker .
# PINS=prepare leaves torch out: rows are turned into tokens without it.
# TORCH_INDEX_URL names another index for the torch wheel, such as PyTorch's own for one CUDA version or for CPUs;
# without it, the usual index's wheel is taken, which brings CUDA.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG PINS=worker
ARG TORCH_INDEX_URL=
WORKDIR /src
COPY deploy/constraints/all.txt deploy/constraints/${PINS}.txt ./
RUN python -m venv /opt/graft \
    && /opt/graft/bin/pip install --no-cache-dir --disable-pip-version-check -r "${PINS}.txt" \
        ${TORCH_INDEX_URL:+--extra-index-url "${TORCH_INDEX_URL}"}
RUN pip install --no-cache-dir --disable-pip-version-check -c all.txt hatchling
COPY deploy/capacity.yaml deploy/catalogue.yaml deploy/
COPY shared shared
COPY services/worker services/worker
RUN pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./shared ./services/worker \
    && /opt/graft/bin/pip install --no-cache-dir --no-deps wheels/*.whl

FROM ${PYTHON_IMAGE}
ARG PINS=worker
# Triton compiles a small launcher in C for each kernel. Not pinned: Debian drops a version when it has a newer one.
# hadolint ignore=DL3008
RUN if [ "${PINS}" = worker ]; then apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*; fi
RUN groupadd --gid 10001 graft \
    && useradd --uid 10001 --gid graft --no-create-home --home-dir /var/lib/graft graft \
    && install -d -o graft -g graft /var/lib/graft
COPY --from=build /opt/graft /opt/graft
ENV PATH=/opt/graft/bin:$PATH \
    HOME=/var/lib/graft \
    GRAFT_STATE_DIR=/var/lib/graft \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /var/lib/graft
USER 10001:10001
CMD ["python", "-m", "graft_worker"]
