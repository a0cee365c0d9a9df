"""Exercises that check themselves: `minilora exercise list | start | check | hint | solution`, also for notebooks.

Each exercise is a file NN_name.toml here: what it teaches, which backward passes to write, what checks them, and hints. The file that a
student gets (template.py) and the solution are minilora's own source.
"""

from minilora.exercises.student import check_here
