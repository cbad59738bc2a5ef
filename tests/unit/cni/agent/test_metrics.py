from __future__ import annotations

from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as classic_families

from cni.agent.metrics import AgentMetrics, prometheus_text


def test_the_text_is_openmetrics_with_the_references_names() -> None:
    metrics = AgentMetrics()
    metrics.plugin_requests.count("200").add()
    metrics.events.count("add").add()
    metrics.failures.count("netns").add()
    metrics.installs.count("SUCCESS").add()
    metrics.install_ready.set(1)
    metrics.repairs.add()
    metrics.proxies.set(2)
    metrics.exempted.set(3)
    metrics.pods("enrolled").set(4)
    metrics.watch_age(lambda: 1.5)
    with metrics.timing_rules():
        pass
    text = "".join(metrics.text())
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["istio_cni_plugin_requests_total"] == 1
    assert samples["nodeagent_reconcile_events_total"] == 1
    assert samples["istio_cni_installs_total"] == 1
    assert samples["istio_cni_install_ready"] == 1
    assert samples["ztunnel_connected"] == 2
    assert samples["ztunnel_cni_repairs_total"] == 1
    assert samples["ztunnel_cni_failures_total"] == 1
    assert samples["ztunnel_cni_pods"] == 4
    assert samples["ztunnel_cni_probe_addresses"] == 3
    assert samples["ztunnel_cni_api_last_contact_age_seconds"] == 1.5
    assert samples["ztunnel_cni_rule_programming_seconds_count"] == 1


def test_the_older_text_says_the_same_with_the_references_types() -> None:
    metrics = AgentMetrics()
    metrics.plugin_requests.count("200").add()
    metrics.watch_age(lambda: 1.5)
    with metrics.timing_rules():
        pass
    text = "".join(metrics.text())
    older = prometheus_text(text)
    # The parser takes the ending away again, as OpenMetrics does.
    for parsed in (text_string_to_metric_families(text), classic_families(older)):
        families = {family.name: family for family in parsed}
        requests = families["istio_cni_plugin_requests"]
        assert (requests.type, requests.documentation) == ("counter", "Events of the plugin")
        assert requests.samples[0].labels == {"response_code": "200"}
        assert families["ztunnel_connected"].type == "gauge"
        assert families["ztunnel_cni_rule_programming_seconds"].type == "histogram"
    assert "# TYPE istio_cni_plugin_requests_total counter\n" in older
    assert "# UNIT" not in older
    assert "# EOF" not in older
