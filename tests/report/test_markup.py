"""Elements as text: order, spelling and escaping of attributes."""

from marble_jax.report.markup import element, items, void


def test_attributes_are_escaped_and_children_are_markup():
    text = element("p", "a &lt; ", element("b", "c"), class_="x", title='"<&>"')
    assert text == '<p class="x" title="&quot;&lt;&amp;&gt;&quot;">a &lt; <b>c</b></p>'


def test_none_is_left_out_and_names_are_spelled_as_in_html():
    text = void("path", class_="curve", stroke_dasharray=None, data_name="n", viewBox="0 0 1 1")
    assert text == '<path class="curve" data-name="n" viewBox="0 0 1 1"/>'
    assert element("table", class_="") == '<table class=""></table>'


def test_items():
    assert items(["a", "b"]) == "<li>a</li><li>b</li>" and items([]) == ""
