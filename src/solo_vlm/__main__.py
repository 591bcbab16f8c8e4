"""Run the command `solo` as `python -m solo_vlm`, for launchers that start modules, such as torchrun."""

from __future__ import annotations

from solo_vlm.cli import main

if __name__ == "__main__":
    main()
