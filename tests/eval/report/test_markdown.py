"""Markdown tables: the first columns are aligned to the left, numbers to the right."""

from eval.report.markdown import markdown_table


def test_names_are_aligned_to_the_left_and_numbers_to_the_right():
    assert markdown_table(["model", "score"], [["a", "1.0"], ["b", ""]]).splitlines() == [
        "| model | score |",
        "| --- | ---: |",
        "| a | 1.0 |",
        "| b |  |",
    ]
    assert markdown_table(["depth", "64"], [], left=0).splitlines()[1] == "| ---: | ---: |"
