"""A Sphinx extension: buttons that lead to a public repository, on the pages only if `_config.yml` names one."""


def setup(app):
    app.connect("config-inited", set_buttons)
    return {"parallel_read_safe": True}


def set_buttons(app, config):
    public = bool(config.html_theme_options.get("repository_url"))
    config.html_theme_options |= {"use_repository_button": public, "use_issues_button": public}
    if not public:
        config.html_theme_options.pop("launch_buttons", None)
