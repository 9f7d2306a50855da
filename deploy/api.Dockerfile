# API, reconciler and migrations: one small image without torch. Build from the repository's root:
#   docker build -f deploy/api.Dockerfile -t graft-api .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY deploy/constraints/all.txt deploy/constraints/api.txt ./
RUN python -m venv /opt/graft \
    && /opt/graft/bin/pip install --no-cache-dir --disable-pip-version-check -r api.txt
RUN pip install --no-cache-dir --disable-pip-version-check -c all.txt hatchling
COPY deploy/capacity.yaml deploy/catalogue.yaml deploy/
COPY shared shared
COPY services/api services/api
RUN pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./shared ./services/api \
    && /opt/graft/bin/pip install --no-cache-dir --no-deps wheels/*.whl \
    && /opt/graft/bin/pip uninstall --yes pip setuptools

FROM ${PYTHON_IMAGE}
RUN groupadd --gid 10001 graft \
    && useradd --uid 10001 --gid graft --no-create-home --home-dir /var/lib/graft graft \
    && install -d -o graft -g graft /var/lib/graft
COPY --from=build /opt/graft /opt/graft
ENV PATH=/opt/graft/bin:$PATH \
    GRAFT_STATE_DIR=/var/lib/graft \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /var/lib/graft
USER 10001:10001
EXPOSE 8000
CMD ["python", "-m", "graft_api", "--host", "0.0.0.0"]
