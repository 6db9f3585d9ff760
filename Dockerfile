# One image for every role; the command chooses: serve, worker, migrate, doctor.
FROM python:3.12-slim AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/sluice
WORKDIR /src

# The dependencies first, with an empty package, so that a change of code does not fetch them again.
COPY pyproject.toml constraints.txt LICENSE ./
RUN mkdir app sql migrations \
    && touch README.md app/__init__.py \
    && /opt/sluice/bin/pip install -c constraints.txt . \
    && /opt/sluice/bin/pip uninstall --yes sluice

COPY README.md ./
COPY app app
COPY sql sql
COPY migrations migrations
RUN /opt/sluice/bin/pip install --no-deps .


FROM python:3.12-slim

ENV PATH=/opt/sluice/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    SLUICE_HOME=/var/lib/sluice
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/sluice sluice
COPY --from=build /opt/sluice /opt/sluice
USER sluice
WORKDIR /var/lib/sluice
EXPOSE 8080

# Asks the API; compose.yaml shows the check of the other roles.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/healthcheck', timeout=4)"]

ENTRYPOINT ["sluice"]
CMD ["serve", "--host", "0.0.0.0"]
