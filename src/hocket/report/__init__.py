"""What came out: summaries, one HTML page, a progress bar, TensorBoard."""

from hocket.report.board import TensorBoard
from hocket.report.page import build
from hocket.report.progress import Progress
from hocket.report.tables import Run, read

__all__ = ["Progress", "Run", "TensorBoard", "build", "read"]
