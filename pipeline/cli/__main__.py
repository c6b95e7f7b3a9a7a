"""``python -m pipeline.cli``, as launchers of several processes start it."""

from pipeline.cli.main import app

if __name__ == "__main__":
    app()
