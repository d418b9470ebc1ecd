"""Axes for the WebUI's X/Y/Z plot: strengths, mixes, modes, ranks and block weights as pictures.

:mod:`.tags` changes the ``<lora:...>`` tags of a prompt, :mod:`.cell` says what one picture of a plot does
to them, :mod:`.axes` is the table of axes, :mod:`.plot` merges what the tags alone cannot say,
:mod:`.register` puts the axes into the host's plot, and :mod:`.infotext` reads a picture's recipe back.
"""
