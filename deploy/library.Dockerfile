# timesearch by itself, from the lock: index, search, ask, serve and mcp, with models behind URLs.
#
#     docker build --file deploy/library.Dockerfile --tag timesearch-library .
#
# With an encoder and policies in the same process: --build-arg EXTRAS="--extra local". deploy/library.yaml uses both.
FROM python:3.13-slim-bookworm AS build
RUN pip install --no-cache-dir uv==0.13.9
WORKDIR /build
ENV UV_PROJECT_ENVIRONMENT=/opt/timesearch UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never
ARG EXTRAS=""
COPY pyproject.toml uv.lock README.md LICENSE ./
RUN uv sync --frozen --no-default-groups --no-install-project $EXTRAS
COPY timesearch timesearch
RUN uv sync --frozen --no-default-groups --no-editable $EXTRAS

FROM python:3.13-slim-bookworm
COPY --from=build /opt/timesearch /opt/timesearch
RUN useradd --create-home timesearch && install --directory --owner timesearch /cache
ENV PATH=/opt/timesearch/bin:$PATH XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
USER timesearch
WORKDIR /home/timesearch
VOLUME /cache
ENTRYPOINT ["timesearch"]
