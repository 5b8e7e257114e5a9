"""Tables, figures and pages. The only room that imports matplotlib and Jinja2."""
