// Package kubernetes checks what the project gives to Kubernetes against its API, in a module of its own.
package kubernetes

import (
	"bytes"
	"os"
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	kubeletv1beta1 "k8s.io/kubelet/config/v1beta1"
	"sigs.k8s.io/yaml"
)

// decode reads a document into an API type; a field that the type does not have fails the test.
func decode(t *testing.T, doc []byte, into any) {
	t.Helper()
	require.NoError(t, yaml.UnmarshalStrict(doc, into, yaml.DisallowUnknownFields), "%s", doc)
}

// TestDaemonSet decodes the manifest strictly, and checks what the API server would check of it.
func TestDaemonSet(t *testing.T) {
	b, err := os.ReadFile("../../deploy/daemonset.yaml")
	require.NoError(t, err)
	docs := bytes.Split(b, []byte("\n---\n"))
	require.Len(t, docs, 2)
	var ns corev1.Namespace
	decode(t, docs[0], &ns)
	require.Equal(t, metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ns.TypeMeta)
	var ds appsv1.DaemonSet
	decode(t, docs[1], &ds)
	require.Equal(t, metav1.TypeMeta{APIVersion: "apps/v1", Kind: "DaemonSet"}, ds.TypeMeta)
	require.Equal(t, ns.Name, ds.Namespace)
	selector, err := metav1.LabelSelectorAsSelector(ds.Spec.Selector)
	require.NoError(t, err)
	require.True(t, selector.Matches(labels.Set(ds.Spec.Template.Labels)))

	pod := ds.Spec.Template.Spec
	require.True(t, pod.HostPID)
	require.Equal(t, "privileged", ns.Labels["pod-security.kubernetes.io/enforce"], "the installer is")
	volumes := map[string]bool{}
	for _, v := range pod.Volumes {
		volumes[v.Name] = true
	}
	for _, c := range append(pod.InitContainers, pod.Containers...) {
		require.NotEmpty(t, c.Image)
		for _, m := range c.VolumeMounts {
			require.True(t, volumes[m.Name], m.Name)
		}
	}
	require.True(t, *pod.InitContainers[0].SecurityContext.Privileged)
	require.Nil(t, pod.Containers[0].SecurityContext.Privileged, "what stays has no rights")
}

// TestKubeletConfiguration decodes what the guide says of the kubelet's configuration.
func TestKubeletConfiguration(t *testing.T) {
	b, err := os.ReadFile("../../docs/kubernetes.md")
	require.NoError(t, err)
	line := regexp.MustCompile(`(?m)^ +(imageServiceEndpoint: .*)$`).FindSubmatch(b)
	require.NotNil(t, line)
	var c kubeletv1beta1.KubeletConfiguration
	decode(t, line[1], &c)
	require.Equal(t, "unix:///run/containerd-clip-grpc/containerd-clip-grpc.sock", c.ImageServiceEndpoint)
}
