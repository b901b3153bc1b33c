"""Grafana's boards and its provisioning as code, and their queries run and drawn without Grafana.

Called by `obsinfra dashboards`. Made from the metric catalogue and the alert table; the boards themselves are
built with grafana-foundation-sdk, which is imported only when they are.
"""
