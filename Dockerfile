# One image for every Ray pod, head and workers alike: `docker build --target cpu -t rapid-serve:0.1.0-cpu .`, or `gpu`.
# KubeRay starts the containers itself, with bash and the `ray` on the PATH, so there is nothing to run by default.

FROM scratch AS source
COPY pyproject.toml constraints.txt LICENSE /
COPY rapid /rapid
COPY retrieval /retrieval
COPY cluster /cluster
COPY deployments /deployments

FROM python:3.11.14-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONPATH=/install/lib/python3.11/site-packages
WORKDIR /src
COPY constraints.txt .

# The two images differ in PyTorch, which comes first: it is the largest layer and changes least.
FROM base AS packages-cpu
RUN pip install --prefix=/install -c constraints.txt --index-url https://download.pytorch.org/whl/cpu \
    --extra-index-url https://pypi.org/simple torch==2.13.0+cpu
COPY --from=source / .
RUN pip install --prefix=/install -c constraints.txt '.[otel]'

FROM base AS packages-gpu
RUN pip install --prefix=/install -c constraints.txt torch==2.13.0
COPY --from=source / .
RUN pip install --prefix=/install -c constraints.txt '.[otel]'

# /usr/local is where this Python looks, and on every PATH. No NVIDIA_VISIBLE_DEVICES here: the device plugin sets it in
# the pods that asked for GPUs, and in a head that saw them Ray would count them.
FROM python:3.11.14-slim-bookworm AS runtime
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.serve.edge:middlewares
RUN groupadd --gid 1000 rapid && useradd --uid 1000 --gid 1000 --create-home rapid
WORKDIR /home/rapid
USER 1000:1000

FROM runtime AS cpu
COPY --from=packages-cpu /install /usr/local

FROM runtime AS gpu
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-gpu /install /usr/local
