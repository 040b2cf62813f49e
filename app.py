"""The demo: `python app.py`, then open the address that it prints."""

from imagegen.studio import launch

if __name__ == "__main__":
    launch()
