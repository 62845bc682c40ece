"""A Sphinx extension of this book: what its pages would have, and should not."""

from docutils import nodes
from sphinx.util.inspect import signature, stringify_signature


def setup(app):
    app.connect("config-inited", set_buttons)
    app.connect("doctree-resolved", explain_terms)
    app.connect("html-page-context", leave_thebe_out, priority=900)
    app.connect("autodoc-process-signature", show_own_arguments)
    return {"parallel_read_safe": True}


def set_buttons(app, config):
    """Lead to a public repository if `_config.yml` names one, else nowhere."""
    public = bool(config.html_theme_options.get("repository_url"))
    config.html_theme_options |= {"use_repository_button": public, "use_issues_button": public}
    if not public:
        config.html_theme_options.pop("launch_buttons", None)


def explain_terms(app, doctree, docname):
    """Show the first sentence of the glossary where a pointer rests on one of its words."""
    items = app.env.get_doctree("glossary").findall(nodes.definition_list_item)
    meanings = {item[0]["ids"][0]: item for item in items}
    for link in doctree.findall(nodes.reference):
        _, _, anchor = link.get("refuri", "").partition("#")
        if docname != "glossary" and anchor in meanings:
            term, meaning = meanings[anchor]
            link["reftitle"] = f"{term.astext()}: {meaning.astext().partition('. ')[0].rstrip('.')}."


def leave_thebe_out(app, pagename, templatename, context, doctree):
    """Take out scripts that Jupyter Book adds twice to every page, which is an error, for a button that is off."""
    context["script_files"] = [script for script in context["script_files"] if "thebe" not in tag(script)]


def tag(script):
    return f"{getattr(script, 'filename', script)} {getattr(script, 'attributes', {}).get('body')}".lower()


def show_own_arguments(app, what, name, obj, options, arguments, returned):
    """Show what a class takes where a base of another library takes anything."""
    if what == "class" and arguments == "(*args, **kwargs)":
        own = signature(obj.__init__, bound_method=True)
        arguments = stringify_signature(own, show_return_annotation=False, unqualified_typehints=True)
    return arguments, returned
