"""The demo: `python app.py`, then open the address that it prints."""

from imagegen.server import launch

if __name__ == "__main__":
    launch()
