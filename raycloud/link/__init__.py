"""Link between edge and cloud: frames, codecs, channels, and a meter of the bytes and messages sent."""
